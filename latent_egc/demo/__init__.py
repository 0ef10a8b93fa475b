"""The demo in a browser: what a network does with images, tried by hand."""
