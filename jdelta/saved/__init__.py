"""What training leaves behind: folders, the Hub, PEFT's format, and arithmetic."""
