//! x86 architectural constants and the few plain types every layer shares.
//!
//! Called by every CPU crate, the firmware and the engines. Only facts of the manuals live here:
//! no behaviour of ours. Sources: Intel SDM volumes 3 and 4, AMD APM volume 2.
#![no_std]
#![forbid(unsafe_code)]

pub mod control;
pub mod cpuid;
pub mod exception;
pub mod flags;
pub mod msr;
pub mod paging;
pub mod segment;
pub mod xsave;

pub use exception::Exception;
pub use segment::{DescriptorTable, Segment, SegmentAttributes, SegmentIndex};
