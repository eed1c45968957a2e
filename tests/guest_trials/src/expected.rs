//! What the initrd's verbs must answer, computed on the host (see `verbs.sh` in the guest catalogue).

use sha2::{Digest, Sha256};

/// The bytes of the shell's `pattern WORD KIB`: the word and a line feed, over and over.
pub fn pattern(word: &str, kib: usize) -> Vec<u8> {
    word.bytes().chain(std::iter::once(b'\n')).cycle().take(kib * 1024).collect()
}

/// The SHA-256 of a pattern, in hexadecimal.
pub fn pattern_sum(word: &str, kib: usize) -> String {
    sum(&pattern(word, kib))
}

/// The final line of `bedplate.checksum=ROUNDS,KIB`.
pub fn checksum_job(rounds: u32, kib: usize) -> String {
    let pool = pattern("bedplate-pool", kib);
    let mut last = "start".to_string();
    for _ in 0..rounds {
        let mut text = last.into_bytes();
        text.push(b'\n');
        text.extend_from_slice(&pool);
        last = sum(&text);
    }
    last
}

/// SHA-256 in hexadecimal.
pub(crate) fn sum(data: &[u8]) -> String {
    Sha256::digest(data).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_shell_computes_the_same() {
        let script = r#"
            pattern() { yes "$1" | head -c $(($2 * 1024)); }
            pattern word 3 | sha256sum | cut -d' ' -f1
            pattern bedplate-pool 2 > "$0"; sum=start
            for round in 1 2 3; do sum=$({ echo "$sum"; cat "$0"; } | sha256sum | cut -d' ' -f1); done
            echo $sum"#;
        let pool = tempfile::NamedTempFile::new().unwrap();
        let done = Command::new("sh").arg("-c").arg(script).arg(pool.path()).output().unwrap();
        let expected = format!("{}\n{}\n", pattern_sum("word", 3), checksum_job(3, 2));
        assert_eq!(String::from_utf8_lossy(&done.stdout), expected);
    }
}
