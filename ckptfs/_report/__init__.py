"""A trace as a page to look at: `analysis` computes, `page` draws."""
