//! RBD: a disk that is an image of a Ceph cluster, by the cluster's own library.
//!
//! What it is: [`uri`] is what an operator types, [`library`] is librbd and librados, loaded when the first such disk is
//! opened, [`image`] is an open image: its lock, its size, and who else has it, `checks` whether it may be served, [`standing`] what
//! follows when the cluster refuses this client, [`client`] and [`held`] what a successor has to know of it.
//!
//! What it is not: it submits no request of a guest; [`crate::engine::rbd`] does. Nothing here knows Ceph's protocol: the
//! library's threads speak it.
//!
//! Invariant: nothing is written to an image by a client that does not own its exclusive lock, and a dead daemon's lock is
//! broken only together with its client, which the cluster then refuses (the blocklist).
//!
//! Names and numbers: rbd/librbd.h and rados/librados.h of Ceph 16.2; <https://docs.ceph.com/en/pacific/rbd/>.

mod checks;
pub mod client;
pub mod held;
pub mod image;
pub mod library;
mod open;
pub mod standing;
pub mod uri;
