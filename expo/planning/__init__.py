"""From a request and headers to a list of tensor jobs: what `expo plan` prints and `merge` runs."""
