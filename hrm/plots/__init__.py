"""Pictures of machines and plans, with matplotlib; imported only when something is drawn."""
