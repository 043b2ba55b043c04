def stripped(data: bytes, kind: str) -> bytes:
    return data
