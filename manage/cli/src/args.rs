//! What can be written on the command line.
//!
//! Called by: `main`. The texts here are the command's manual: each says what to write and shows an example.

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use std::path::PathBuf;
use vmm::wire::EngineChoice;

const EXAMPLES: &str = "\
Examples:
  bedplate run --kernel vmlinuz --initrd initrd.img --append console=ttyS0
  bedplate run --kernel vmlinuz --append 'console=ttyS0 root=/dev/vda1' \\
      --disk debian.qcow2 --net user,hostfwd=tcp:127.0.0.1:2222-:22 --cpus 2 --memory 1G
  bedplate run web.toml --name web
  bedplate ps
  bedplate ctl web pause";

const ABOUT: &str = "Runs unmodified operating systems in VMs, with or without virtualization hardware";

/// The command line.
#[derive(Debug, Parser)]
#[command(name = "bedplate", version, about = ABOUT, long_about = ABOUT, after_help = EXAMPLES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// See [`Cli`].
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a VM on this terminal until it ends
    Run(Box<RunArgs>),
    /// List running VMs
    Ps {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Look after a running VM
    #[command(after_help = CTL_EXAMPLES)]
    Ctl {
        /// Its name
        name: String,
        /// What to do
        #[command(subcommand)]
        what: Ctl,
        /// Answer as JSON
        #[arg(long, global = true)]
        json: bool,
    },
    /// Say what this host can give VMs, and what would make it give more
    Doctor {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Prepare known guests from distribution packages
    #[command(after_help = "Example:\n  bedplate guest fetch cloud", subcommand)]
    Guest(GuestCommand),
    /// Print a completion script for a shell
    #[command(
        after_help = "Example:\n  bedplate completion bash > ~/.local/share/bash-completion/completions/bedplate"
    )]
    Completion {
        /// The shell.
        shell: Shell,
    },
}

impl Command {
    /// Whether the answer, a failure too, is to be JSON.
    pub fn json(&self) -> bool {
        match self {
            Self::Run(args) => args.json,
            Self::Ps { json } | Self::Ctl { json, .. } | Self::Doctor { json } => *json,
            Self::Guest(_) | Self::Completion { .. } => false,
        }
    }
}

const CTL_EXAMPLES: &str = "\
Examples:
  bedplate ctl web status
  bedplate ctl web save web.saved            the VM ends; bedplate run --restore web.saved goes on with it
  bedplate ctl web save --continue web.saved the VM goes on, its disks in overlays";

/// What `bedplate guest` can do.
#[derive(Debug, Subcommand)]
pub enum GuestCommand {
    /// List known guests, and which are prepared
    List,
    /// Prepare a guest, and print how to run it
    Fetch {
        /// Its name; all if none is given
        names: Vec<String>,
        /// Prepare it again, even if it is there
        #[arg(long)]
        again: bool,
    },
    /// Compare a prepared guest's files with their checksums
    Verify {
        /// Its name
        name: String,
    },
    /// Remove a prepared guest
    Remove {
        /// Its name
        name: String,
    },
}

/// What `bedplate ctl` can do.
#[derive(Debug, Subcommand)]
pub enum Ctl {
    /// Say how it is
    Status,
    /// Make it stand still
    Pause,
    /// Let it go on
    Resume,
    /// Start it again, as the reset button does
    Reset,
    /// Press its power button: a guest that listens shuts down
    Stop,
    /// End it now
    Kill,
    /// Let it go on on another engine, without stopping
    Move {
        /// The engine
        #[arg(long, value_enum)]
        engine: Engine,
    },
    /// Save it to a file
    Save {
        /// The file
        file: PathBuf,
        /// Let it go on, with every writable disk in an overlay
        #[arg(long = "continue")]
        and_continue: bool,
        /// Compress memory with zstd
        #[arg(long)]
        compress: bool,
    },
}

const RUN_HELP: &str = "\
Examples:
  bedplate run --kernel vmlinuz --initrd initrd.img --append console=ttyS0
  bedplate run --kernel vmlinuz --append 'console=ttyS0 root=/dev/vda1' --disk debian.qcow2 --net user
  bedplate run web.toml --name web
  bedplate run --restore web.saved

The serial console is this terminal. Ctrl-A x ends the VM, Ctrl-A h shows the keys, Ctrl-A Ctrl-A sends Ctrl-A.

What is given here overrides the spec file; disks, networks and consoles are added to its own.";

/// Arguments of `bedplate run`.
#[derive(Debug, Default, Args)]
#[command(after_help = RUN_HELP, after_long_help = long_help())]
pub struct RunArgs {
    /// Spec file (TOML)
    #[arg(value_name = "SPEC.toml")]
    pub spec: Option<PathBuf>,
    /// Kernel: a distribution's vmlinuz (bzImage), or an ELF kernel with a PVH entry
    #[arg(long, value_name = "FILE", help_heading = "Boot")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE", help_heading = "Boot")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, help_heading = "Boot")]
    pub append: Option<String>,
    /// Disk: PATH[,ro][,format=raw|qcow2][,discard=on|off][,backing=PATH]; may be given several times
    #[arg(long, value_name = "DISK", help_heading = "Devices")]
    pub disk: Vec<String>,
    /// Network: user[,hostfwd=tcp:ADDR:PORT-:PORT][,hostloopback=on] or tap,ifname=NAME; several times
    #[arg(long, value_name = "NET", help_heading = "Devices")]
    pub net: Vec<String>,
    /// Serial port: stdio, unix:PATH, file:PATH or none; the first is COM1, which is stdio if none is given
    #[arg(long, value_name = "END", help_heading = "Devices")]
    pub serial: Vec<String>,
    /// virtio console: stdio, unix:PATH, file:PATH or none; several times
    #[arg(long, value_name = "END", help_heading = "Devices")]
    pub console: Vec<String>,
    /// Processors
    #[arg(long, value_name = "N", help_heading = "Machine")]
    pub cpus: Option<u32>,
    /// Memory, as in 512M or 4G
    #[arg(long, value_name = "SIZE", help_heading = "Machine")]
    pub memory: Option<String>,
    /// CPU model and extras, as in x86-64-v3,+sha or max
    #[arg(long, value_name = "MODEL", help_heading = "Machine")]
    pub cpu_model: Option<String>,
    /// What executes the guest's instructions
    #[arg(long, value_enum, help_heading = "Machine")]
    pub engine: Option<Engine>,
    /// Rate of guest time, as in 1/8 of host time
    #[arg(long, value_name = "RATE", help_heading = "Machine")]
    pub clock_rate: Option<String>,
    /// Name, for ps and ctl
    #[arg(long, value_name = "NAME", help_heading = "Running")]
    pub name: Option<String>,
    /// What a reset by the guest does
    #[arg(long, value_enum, help_heading = "Running")]
    pub on_reset: Option<OnReset>,
    /// What a panic of the guest's kernel does, as seen on its serial console
    #[arg(long, value_enum, help_heading = "Running")]
    pub on_panic: Option<OnPanic>,
    /// Go on with a VM saved by ctl save, or on bare metal; takes nothing else but --name, --engine, --no-sandbox,
    /// and --disk for each of its disks if they are elsewhere now
    #[arg(long, value_name = "FILE", help_heading = "Running", conflicts_with_all = [
        "spec", "kernel", "initrd", "append", "net", "serial", "console", "cpus", "memory", "cpu_model",
        "clock_rate", "on_reset", "on_panic", "dry_run",
    ])]
    pub restore: Option<PathBuf>,
    /// The saved VM's disks were moved, or copied with their times: take them if size and last change are as saved
    #[arg(long, help_heading = "Running", requires = "restore")]
    pub disks_moved: bool,
    /// Run without the jail: for debugging (a trace of the stack, strace, a profiler)
    #[arg(long, help_heading = "Running")]
    pub no_sandbox: bool,
    /// Write what is translated to a file: the guest's code, and what became of it (100 MB for a boot, and more as it runs)
    #[arg(long, value_name = "FILE", help_heading = "Running")]
    pub trace_blocks: Option<PathBuf>,
    /// Write /tmp/perf-PID.map, by which perf names translated code
    #[arg(long, help_heading = "Running")]
    pub perf_map: bool,
    /// Say how it ended (or, with --dry-run, what it is) as JSON, in the last line
    #[arg(long, help_heading = "Running")]
    pub json: bool,
    /// Say at the end what the processors did: instructions, CPU time, MIPS
    #[arg(long, help_heading = "Running")]
    pub statistics: bool,
    /// Print the complete spec and do not run it
    #[arg(long, help_heading = "Running")]
    pub dry_run: bool,
}

/// See `RunArgs::engine`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Engine {
    /// The fastest that works on this host
    Auto,
    /// The host's KVM
    Kvm,
    /// Software: works everywhere
    #[value(alias = "soft-translate")]
    Soft,
    /// Software that interprets everything, slowly: the reference
    #[value(name = "soft,tier=interp")]
    SoftInterpreter,
    /// Software with all that is translated compared with the interpreter; one processor
    #[value(name = "soft,lockstep", hide = true)]
    SoftLockstep,
}

impl From<Engine> for EngineChoice {
    fn from(engine: Engine) -> Self {
        match engine {
            Engine::Auto => Self::Auto,
            Engine::Kvm => Self::Kvm,
            Engine::Soft => Self::Soft,
            Engine::SoftInterpreter => Self::SoftInterpreter,
            Engine::SoftLockstep => Self::SoftLockstep,
        }
    }
}

/// See `RunArgs::on_reset`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnReset {
    /// Start again
    Reboot,
    /// End the VM
    Stop,
}

/// See `RunArgs::on_panic`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnPanic {
    /// End the VM
    Stop,
    /// Leave it
    Keep,
}

fn long_help() -> String {
    let mut text = format!("{RUN_HELP}\n\nExit codes:\n");
    for code in vmm::exit::EXIT_CODES {
        text.push_str(&format!("  {:>3}  {}\n", code.code, code.meaning));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_sound_and_the_help_names_keys_and_codes() {
        Cli::command().debug_assert();
        let help = Cli::command().find_subcommand_mut("run").unwrap().render_long_help().to_string();
        for part in ["Ctrl-A x", "Exit codes", "21", "hostfwd=tcp:", "Examples:\n  bedplate run --kernel"] {
            assert!(help.contains(part), "{part} in {help}");
        }
    }

    #[test]
    fn a_command_line_as_in_the_manual() {
        let cli = Cli::parse_from([
            "bedplate",
            "run",
            "vm.toml",
            "--kernel",
            "k",
            "--append",
            "-x console=ttyS0",
            "--disk",
            "a,ro",
            "--disk",
            "b",
            "--cpus",
            "2",
            "--memory",
            "1G",
            "--engine",
            "soft",
            "--on-reset",
            "stop",
            "--dry-run",
        ]);
        let Command::Run(run) = cli.command else { panic!("another command") };
        assert_eq!(run.disk, ["a,ro", "b"]);
        assert_eq!((run.cpus, run.engine, run.on_reset), (Some(2), Some(Engine::Soft), Some(OnReset::Stop)));
        assert_eq!(run.append.as_deref(), Some("-x console=ttyS0"));
    }
}
