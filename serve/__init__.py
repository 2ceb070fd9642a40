"""The online side: Ray Serve application and HTTP API."""
