"""The online side: the HTTP application, its requests, and products that come while it serves."""
