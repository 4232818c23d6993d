//! NBD: a disk that another program serves, over a Unix socket or TCP.
//!
//! What it is: the pure half of a client. [`uri`] is what an operator types, [`connect`] and [`handshake`] lead to an
//! export that is ready for requests, [`wire`] is the bytes of requests and replies.
//!
//! What it is not: it submits no request of a guest and knows no slot; an engine does. There is no TLS, and no server.
//!
//! Invariant: every length and count that a server sends is bounded before it is used. No byte of a server leads to a
//! panic, an endless loop or memory without a limit.
//!
//! ```text
//!   client                                server
//!     │ ◄──────────── NBDMAGIC IHAVEOPT flags │   handshake, blocking
//!     │ flags ──────────────────────────────► │
//!     │ STRUCTURED_REPLY, GO export ────────► │
//!     │ ◄──────── size, flags, block sizes    │
//!     │ ═════════════════════════════════════ │   transmission: many requests at a time, replies in any order
//!     │ magic flags type cookie offset len ─► │   28 bytes, then the data of a write
//!     │ ◄───────────── magic error cookie     │   16 bytes: a simple reply, or
//!     │ ◄─ magic flags type cookie len data   │   20 bytes and a payload: a chunk; the last one says so
//! ```
//!
//! The protocol: doc/proto.md and doc/uri.md of the NBD project, <https://github.com/NetworkBlockDevice/nbd>. Names of
//! sections in comments are theirs.

pub mod connect;
pub mod fence;
pub mod handshake;
pub mod marks;
pub mod remote;
pub mod uri;
pub mod wire;
