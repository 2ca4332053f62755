"""What a run will take, on the chips one can get, before anything is bought or started. No torch in this room."""
