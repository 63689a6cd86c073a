"""What every command and every process shares; nothing here is about stores."""
