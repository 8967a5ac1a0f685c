//! Formats on the wire, sans-io: bytes in, values out, and back.
