"""From the hospital's archive to a cohort: find, fetch, de-identify and write studies.

What this package writes contains pseudonyms only, but for the mapping table that is written on request.
"""
