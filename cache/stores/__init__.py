"""What is done to whole stores: join, choose from, code anew, verify."""
