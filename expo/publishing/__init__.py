"""From a verified folder to the Hub: what would be sent, the upload, one commit, the receipt."""
