//! Several vCPUs: atomicity, inter-processor interrupts, code and translations that change under others.

mod atomics;
mod code;
mod ipi;
mod start;
