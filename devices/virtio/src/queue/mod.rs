//! Split virtqueues.
mod buffer;
pub use buffer::Buffer;
