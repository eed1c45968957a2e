//! Tables from the manuals for system instructions, faults and their error codes, on a small machine.

extern crate std;

mod branches;
mod control_registers;
mod debugging;
mod deliver_legacy;
mod deliver_long;
mod descriptor_tables;
mod flag_instructions;
mod gates;
mod hostile;
mod machine;
mod misc_instructions;
mod model_registers;
mod port_instructions;
mod returns;
mod segment_loads;
mod system_calls;
mod tasks;
mod v86;
