//! The `bedplate` command.
#![forbid(unsafe_code)]

fn main() {}
