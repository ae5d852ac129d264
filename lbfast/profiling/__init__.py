"""What a machine is and can do, where a model's time goes on it, and what it draws from the mains meanwhile."""
