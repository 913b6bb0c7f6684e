"""A tiny trained SFT / aligned pair on which extrapolation can be watched, offline, in seconds."""
