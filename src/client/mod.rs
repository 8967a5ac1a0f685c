//! The client library of the datagram protocol, over kernel sockets.
