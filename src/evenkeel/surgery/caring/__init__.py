"""Running statistics: `measuring` takes them from data, `together` over several processes."""
