"""What the front doors of node and proxy do alike, before their application looks at a request: bounds."""
