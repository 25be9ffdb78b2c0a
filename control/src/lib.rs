//! The control socket: its file, its server, its client.
