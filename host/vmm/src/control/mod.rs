//! Looking after a VM from outside: a socket in the user's runtime folder, one line of JSON for a request, one for its
//! answer.
//!
//! Called by: `launch` ([`server`]), the `bedplate` command ([`client`]).
//!
//! Invariants: only the user who runs the VM can connect (folder 0700); a line is capped; a client that says nothing
//! holds one connection, and there are few.

pub mod client;
pub mod folder;
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
    /// Save to a file.
    Save {
        /// The file, an absolute path.
        file: PathBuf,
        /// Go on afterwards, with every writable disk in an overlay.
        #[serde(default, rename = "continue")]
        and_continue: bool,
        /// Compress RAM with zstd.
        #[serde(default)]
        compress: bool,
    },
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
        assert_eq!(ask, Ask::Save { file: "/x".into(), and_continue: true, compress: false });
        assert_eq!(serde_json::to_string(&Ask::Status).unwrap(), r#"{"op":"status"}"#);
        assert!(serde_json::from_str::<Ask>(r#"{"op":"format"}"#).is_err());
        let answer = serde_json::to_string(&Answer::refused("no")).unwrap();
        assert_eq!(answer, r#"{"ok":false,"error":"no"}"#);
        assert_eq!(serde_json::from_str::<Answer>(r#"{"ok":true,"later":1}"#).unwrap(), Answer::done(None));
    }
}
