"""``dspark-tools export``: a draft folder for servers and hubs."""
