//! Known guest operating systems, prepared from distribution packages.
//!
//! What it is: a table of guests ([`guests`]) and a [`Cache`] that turns one of them into files a machine can
//! boot (kernel, initrd, disk) below the user's cache folder. Called by `bedplate guest fetch`, by `cargo xtask`
//! and by the guest trials.
//!
//! Invariants:
//! - Nothing on the host system changes: packages are downloaded and unpacked into the cache, never installed.
//! - A guest appears in the cache whole (renamed into place) or not at all; its manifest is written last.
//! - Everything read out of a package (kernels, modules) is treated as hostile: lengths are checked and capped.

#![forbid(unsafe_code)]

pub mod bzimage;
mod cache;
mod catalog;
pub mod cpio;
mod elf;
mod error;
mod fetch;
pub mod gpt;
mod initrd;
mod manifest;
mod modules;
mod prepare;
mod progress;
mod tools;

pub use cache::Cache;
pub use catalog::{Architecture, Guest, Recipe, find, guests};
pub use error::CatalogError;
pub use initrd::{INIT_MARKER, READY_MARKER};
pub use manifest::{DiskFormat, Prepared};
pub use progress::{Progress, Quiet};
