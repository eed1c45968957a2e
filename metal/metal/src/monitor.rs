//! The monitor on the serial line: what people type, as typed requests. Under it: [`crate::line_editor`].
//!
//! Called by: `ground`, which does what is asked. Nothing here touches a VM or the port.

use alloc::string::{String, ToString};
use alloc::vec::Vec;

/// Something that the monitor is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// All VMs, with what they do.
    List,
    /// Typing goes to this VM.
    Console(usize),
    /// It stands still.
    Pause(usize),
    /// It goes on.
    Resume(usize),
    /// It starts, having ended.
    Start(usize),
    /// It starts again.
    Reset(usize),
    /// It ends.
    Stop(usize),
    /// It is saved, and ends.
    Save(usize),
    /// Its exits and its time.
    Statistics(usize),
    /// Last lines of a VM; without one, the hypervisor's.
    Log(Option<usize>),
    /// Memory of the machine.
    Memory,
    /// How busy the machine's processors are.
    Processors,
    /// The hypervisor breaks down.
    Crash(Crash),
    /// A disk that is no VM's reads to where it must not write.
    Stray,
    /// These commands.
    Help,
}

/// In which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crash {
    /// A panic.
    Panic,
    /// The stack is full.
    Stack,
}

/// For `help`.
pub const HELP: &str = "\
list            all VMs
console N       type to VM N (Ctrl-A 0 comes back here)
pause N         let VM N stand still
resume N        let it go on
reset N         start it again
stop N          end it
save N          save it to the disk that its spec names, and end it
start N         start it, once it has ended
stats N         its exits and its time
log             last lines of the hypervisor
log N           last lines of VM N
memory          memory of this machine
cpus            its processors, and how busy they are
crash panic     end the hypervisor, and see how it tells
crash stack     the same by a stack that overflows
crash dma       have a disk that is no VM's write where it must not
help            this";

/// The request in a line, `None` in an empty one. VMs are counted from 1 by people.
pub fn parse(line: &str, vms: usize) -> Result<Option<Command>, String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let vm = |make: fn(usize) -> Command| match words.get(1).map(|word| word.parse::<usize>()) {
        Some(Ok(number)) if (1..=vms).contains(&number) && words.len() == 2 => Ok(Some(make(number - 1))),
        _ => Err(alloc::format!("say which VM, 1 to {vms}")),
    };
    let alone = |command: Command| {
        if words.len() == 1 { Ok(Some(command)) } else { Err("this takes no more words".to_string()) }
    };
    match words.first().copied() {
        None => Ok(None),
        Some("list" | "ls") => alone(Command::List),
        Some("console") => vm(Command::Console),
        Some("pause") => vm(Command::Pause),
        Some("resume") => vm(Command::Resume),
        Some("reset") => vm(Command::Reset),
        Some("save") => vm(Command::Save),
        Some("start") => vm(Command::Start),
        Some("log") if words.len() == 1 => Ok(Some(Command::Log(None))),
        Some("log") => vm(|number| Command::Log(Some(number))),
        Some("crash") => match words[1..] {
            ["panic"] => Ok(Some(Command::Crash(Crash::Panic))),
            ["stack"] => Ok(Some(Command::Crash(Crash::Stack))),
            ["dma"] => Ok(Some(Command::Stray)),
            _ => Err("say how: crash panic, crash stack or crash dma".to_string()),
        },
        Some("stop") => vm(Command::Stop),
        Some("stats") => vm(Command::Statistics),
        Some("memory") => alone(Command::Memory),
        Some("cpus") => alone(Command::Processors),
        Some("help" | "?") => alone(Command::Help),
        Some(other) => Err(alloc::format!("there is no command `{other}`; try help")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_requests() {
        assert_eq!(parse("", 2), Ok(None));
        assert_eq!(parse("  list ", 2), Ok(Some(Command::List)));
        assert_eq!(parse("console 2", 2), Ok(Some(Command::Console(1))));
        for wrong in ["console", "console 0", "console 3", "stop x", "stop 1 2", "list 1", "jump"] {
            assert!(parse(wrong, 2).is_err(), "{wrong}");
        }
        for line in HELP.lines() {
            let typed = line.split("  ").next().unwrap().replace('N', "1");
            assert!(parse(&typed, 1).is_ok(), "{typed}");
        }
    }
}
