"""Publishing: the model card and the upload of a finished folder to the Hub."""
