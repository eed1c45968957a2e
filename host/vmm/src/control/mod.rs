//! Looking after a VM from outside: a socket in the user's runtime folder, one line of JSON for a request, one for its
//! answer. It names no files: what it is to write comes as open files beside the line.
//!
//! Called by: `launch` ([`server`]), the `bedplate` command ([`client`]).
//!
//! Invariants: only the user who runs the VM can connect (folder 0700); a line is capped; a client that says nothing
//! holds one connection, and there are few.

pub mod client;
pub mod folder;
mod lines;
pub mod save;
pub mod server;

use crate::wire::EngineChoice;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Longest line of either side.
pub const MAX_LINE_BYTES: u64 = 64 << 10;

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "lowercase", deny_unknown_fields)]
pub enum Ask {
    /// How is it?
    Status,
    /// Stand still.
    Pause,
    /// Go on.
    Resume,
    /// Start again.
    Reset,
    /// Press the power button: a guest that listens shuts down.
    Stop,
    /// End now.
    Kill,
    /// Go over to another engine.
    Move {
        /// Which.
        engine: EngineChoice,
    },
    /// Which files does it use?
    Files,
    /// Save to a file. With the line comes (SCM_RIGHTS) the file, new and empty, and with `continue` a new, empty file
    /// for each of `overlays`. The answer is [`Answer::written`], and the VM stands still until [`Ask::Placed`].
    Save {
        /// What the file will be called.
        file: PathBuf,
        /// Go on afterwards, with every writable disk in an overlay.
        #[serde(default, rename = "continue")]
        and_continue: bool,
        /// Compress RAM with zstd.
        #[serde(default)]
        compress: bool,
        /// The overlays.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        overlays: Vec<Overlay>,
    },
    /// The saved file has its name now.
    Placed,
}

/// An overlay in a file that comes with a save.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Overlay {
    /// The image that it is for.
    pub of: PathBuf,
    /// The file's path.
    pub path: PathBuf,
}

/// The files of a VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Files {
    /// All of them.
    pub used: Vec<PathBuf>,
    /// Images that the guest writes.
    pub written: Vec<PathBuf>,
}

/// What is answered.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Whether it was done.
    pub ok: bool,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// What there is to say about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// The save is written; not yet in its place.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub written: bool,
    /// For [`Ask::Files`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub files: Option<Files>,
    /// For [`Ask::Status`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<Status>,
}

impl Answer {
    /// It was done.
    pub fn done(message: Option<String>) -> Self {
        Self { ok: true, message, ..Self::default() }
    }
    /// It was not.
    pub fn refused(error: impl Into<String>) -> Self {
        Self { error: Some(error.into()), ..Self::default() }
    }
}

/// How a VM is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Its name.
    pub name: String,
    /// Process that holds it.
    pub pid: u32,
    /// `created`, `running`, `paused` or `stopped`.
    pub state: String,
    /// vCPUs.
    pub cpus: u32,
    /// RAM.
    pub memory_bytes: u64,
    /// Engine.
    pub engine: String,
    /// Guest time since it was first started, in milliseconds.
    pub uptime_ms: u64,
    /// Instructions executed by all vCPUs, if the engine counts them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instructions: Option<u64>,
    /// Guest time that vCPUs spent executing, summed over them, in milliseconds.
    #[serde(default)]
    pub busy_ms: u64,
    /// What else its engine counts.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub counts: BTreeMap<String, u64>,
    /// Version of the program.
    pub version: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_what_the_manual_says() {
        let line = r#"{"op":"save","file":"/x","continue":true}"#;
        let ask: Ask = serde_json::from_str(line).unwrap();
        assert_eq!(
            ask,
            Ask::Save { file: "/x".into(), and_continue: true, compress: false, overlays: Vec::new() }
        );
        assert_eq!(serde_json::to_string(&Ask::Status).unwrap(), r#"{"op":"status"}"#);
        assert!(serde_json::from_str::<Ask>(r#"{"op":"format"}"#).is_err());
        let answer = serde_json::to_string(&Answer::refused("no")).unwrap();
        assert_eq!(answer, r#"{"ok":false,"error":"no"}"#);
        assert_eq!(serde_json::from_str::<Answer>(r#"{"ok":true,"later":1}"#).unwrap(), Answer::done(None));
    }
}
