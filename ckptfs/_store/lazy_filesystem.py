# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUntypedBaseClass=false
# pyright: reportUnknownVariableType=false
"""pyarrow filesystems that are built at their first use.

Building one can ask a server, because pyarrow's S3FileSystem needs a region. ckptfs reads with its
own clients, and needs only the location of the filesystem.
"""

import functools
import importlib.util
import os
import urllib.error
import urllib.request
from typing import Any

import msgspec
from pyarrow import fs as pafs

from ckptfs._model.location import Location
from ckptfs._model.named_store import named_location
from ckptfs._store.build import filesystem_for
from ckptfs._store.kinds import KINDS
from ckptfs._store.named import own_location
from ckptfs._store.wrappers import ANSWER_S, within
from ckptfs.errors import LocationError, StoreUnavailable

_REGION = "us-east-1"
"""The region for servers that are not Amazon's, and for buckets that Amazon does not know."""


class LazyHandler(pafs.FileSystemHandler):
    """The handler that pyarrow calls. Each method calls the method of the real filesystem."""

    def build(self) -> Any:
        """Build the real filesystem."""
        raise NotImplementedError

    @functools.cached_property
    def filesystem(self) -> Any:
        """The real filesystem, which is built at its first use."""
        return self.build()

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> Any:
        return self.filesystem.get_file_info(paths)

    def get_file_info_selector(self, selector: Any) -> Any:
        return self.filesystem.get_file_info(selector)

    def create_dir(self, path: str, recursive: bool) -> None:
        self.filesystem.create_dir(path, recursive=recursive)

    def delete_dir(self, path: str) -> None:
        self.filesystem.delete_dir(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self.filesystem.delete_dir_contents(path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        self.filesystem.delete_dir_contents("/", accept_root_dir=True)

    def delete_file(self, path: str) -> None:
        self.filesystem.delete_file(path)

    def move(self, src: str, dest: str) -> None:
        self.filesystem.move(src, dest)

    def copy_file(self, src: str, dest: str) -> None:
        self.filesystem.copy_file(src, dest)

    def open_input_stream(self, path: str) -> Any:
        return self.filesystem.open_input_stream(path, compression=None)

    def open_input_file(self, path: str) -> Any:
        return self.filesystem.open_input_file(path)

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        return self.filesystem.open_output_stream(path, compression=None, metadata=metadata)

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        return self.filesystem.open_append_stream(path, compression=None, metadata=metadata)


class UriHandler(LazyHandler):
    """The handler for the store of a URI. Its `location` has an empty path, and the URI's
    secrets."""

    def __init__(self, location: Location) -> None:
        self.location = msgspec.structs.replace(location, path="")
        self._bucket = location.path.partition("/")[0]

    def __reduce__(self) -> tuple[type["UriHandler"], tuple[Location]]:
        return UriHandler, (msgspec.structs.replace(self.location, path=self._bucket),)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UriHandler) and self.__reduce__() == other.__reduce__()

    def __hash__(self) -> int:
        return hash((self.location.identity, self._bucket))

    def build(self) -> Any:
        """Raises LocationError; StoreUnavailable if Amazon does not name the bucket's region."""
        if self.location.kind == "az" and importlib.util.find_spec("adlfs") is None:
            raise LocationError(
                f"az://{self._bucket}: a package for az:// is not installed; pip install adlfs"
            )
        options = dict(self.location.options)
        if self.location.kind == "s3" and not options.get("region"):
            options["region"] = _region_for(options, self._bucket)
        if self.location.kind == "gcs":  # pyarrow's default for anonymous access is http
            options.setdefault("scheme", "https")
        return filesystem_for(msgspec.structs.replace(self.location, options=options))

    def get_type_name(self) -> str:
        return KINDS[self.location.kind].arrow_name


class StoreHandler(LazyHandler):
    """The handler for a named store. Raises UnknownStore if the configuration lacks the store.

    It has only the name of the store, and reads the configuration of the process that uses it. So a
    program can pickle it and send it to another node without credentials.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> tuple[type["StoreHandler"], tuple[str]]:
        return StoreHandler, (self.name,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoreHandler) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def build(self) -> Any:
        location = own_location(named_location(self.name, "", None))
        return pafs.SubTreeFileSystem(location.path or "/", filesystem_for(location))

    def get_type_name(self) -> str:
        return f"ckptfs-store:{self.name}"


def _region_for(options: dict[str, Any], bucket: str) -> str:
    named = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    elsewhere = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    if named or options.get("endpoint_override") or any(os.environ.get(v) for v in elsewhere):
        return named or _REGION
    return within(ANSWER_S, f"s3://{bucket}", _region_of, bucket)


def _region_of(bucket: str) -> str:
    """The region of a bucket. Amazon names it even if it denies access."""
    url = f"https://s3.{_REGION}.amazonaws.com/{bucket}"
    request = urllib.request.Request(url, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_S) as response:
            headers = response.headers
    except urllib.error.HTTPError as error:
        headers = error.headers
        error.close()
    except OSError as error:
        raise StoreUnavailable(
            f"s3://{bucket}: cannot ask Amazon for the bucket's region ({error}); give "
            "region= in the URI, or AWS_REGION"
        ) from None
    return headers.get("x-amz-bucket-region") or _REGION
