"""What each policy makes of given batches: loads by rank, and how they are told in figures, words, tables and a picture.

The demo shows it of live ranks, the replay of recordings.
"""
