"""What is written for others: model folders, reports and their verification."""
