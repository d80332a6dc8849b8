"""An edit: its updates, how they are applied, limited, measured, stored and composed."""
