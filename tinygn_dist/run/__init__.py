"""What is known of this run? Its state, how it goes on after a stop, its verified export, its report."""
