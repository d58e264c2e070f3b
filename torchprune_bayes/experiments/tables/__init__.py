"""The published tables that can be reproduced, a file for each paper."""
