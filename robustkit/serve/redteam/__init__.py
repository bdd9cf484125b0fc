"""The attacker's side of an API: what reaches the service is PNG bytes under a key, what comes back an answer or none.

    client    keys, waiting, counting: one query on the wire
    oracle    the client as a model for one image, within a budget; 8 bits, rejections, what counts as found
    attacks   what asks it, and how it adapts to rejections
    campaign  attacks on images one by one, each success asked about again; the record
    records   that record, and page its section of a report; neither needs torch

Use it against services that are yours.
"""
