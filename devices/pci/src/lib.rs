//! PCI Express.
#![no_std]
#![forbid(unsafe_code)]
