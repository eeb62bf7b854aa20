"""The file system in plain types: files, directories and extended attributes, without FUSE."""
