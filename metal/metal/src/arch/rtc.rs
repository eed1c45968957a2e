//! The wall clock of the board: the MC146818's registers (UTC, as every server keeps them).

use super::{in8, out8};

const INDEX: u16 = 0x70;
const DATA: u16 = 0x71;
const STATUS_A: u8 = 0x0A;
const STATUS_B: u8 = 0x0B;
const UPDATING: u8 = 1 << 7;
const BINARY: u8 = 1 << 2;
const HOURS_24: u8 = 1 << 1;

fn read(register: u8) -> u8 {
    // Bit 7 keeps NMIs on.
    out8(INDEX, register);
    in8(DATA)
}

fn registers() -> [u8; 6] {
    for _ in 0..100_000 {
        if read(STATUS_A) & UPDATING == 0 {
            break;
        }
    }
    [0, 2, 4, 7, 8, 9].map(read)
}

/// Nanoseconds since 1970.
pub fn wall_ns() -> u64 {
    let mut now = registers();
    // An update between two reads shows as a difference.
    for _ in 0..10 {
        let again = registers();
        if again == now {
            break;
        }
        now = again;
    }
    seconds(now, read(STATUS_B)).saturating_mul(1_000_000_000)
}

/// Seconds since 1970 of the registers second, minute, hour, day, month, year (of this century).
fn seconds(registers: [u8; 6], status_b: u8) -> u64 {
    let binary = |value: u8| if status_b & BINARY != 0 { value } else { (value >> 4) * 10 + (value & 15) };
    let afternoon = registers[2] & 0x80 != 0;
    let [second, minute, mut hour, day, month, year] =
        [registers[0], registers[1], registers[2] & 0x7F, registers[3], registers[4], registers[5]]
            .map(|value| u64::from(binary(value)));
    if status_b & HOURS_24 == 0 {
        hour = hour % 12 + if afternoon { 12 } else { 0 };
    }
    let days = days_since_1970(2000 + year, month.clamp(1, 12), day.max(1));
    ((days * 24 + hour) * 60 + minute) * 60 + second
}

/// Howard Hinnant's "days from civil", for years from 1970 on.
fn days_since_1970(year: u64, month: u64, day: u64) -> u64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, of_era) = (year / 400, year % 400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + day_of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_become_seconds() {
        assert_eq!(seconds([0x15, 0x30, 0x12, 0x26, 0x11, 0x26], HOURS_24), 1_795_696_215);
        assert_eq!(seconds([15, 30, 12, 26, 11, 26], HOURS_24 | BINARY), 1_795_696_215);
        // Twelve at noon and at midnight.
        assert_eq!(seconds([15, 30, 0x80 | 12, 26, 11, 26], BINARY), 1_795_696_215);
        assert_eq!(seconds([15, 30, 12, 26, 11, 26], BINARY), 1_795_696_215 - 12 * 3600);
        assert_eq!(seconds([0, 0, 0, 1, 1, 0], HOURS_24 | BINARY), 946_684_800);
    }
}
