//! Seconds since 1970 and the proleptic Gregorian calendar (day numbers counted from 1 March, so that the
//! leap day is the last of its year).

/// A date and time, binary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct DateTime {
    pub second: u8,
    pub minute: u8,
    pub hour: u8,
    pub day: u8,
    pub month: u8,
    /// 0 to 9999.
    pub year: u16,
}

const DAY: i64 = 86_400;
/// Days from 1 March of year 0 to 1 January 1970.
const EPOCH: i64 = 719_468;
/// Days of 400 years.
const ERA: i64 = 146_097;
/// What fits four digits: years 0 to 9999.
const RANGE: core::ops::RangeInclusive<i64> = -62_167_219_200..=253_402_300_799;

impl DateTime {
    pub fn from_seconds(seconds: i64) -> Self {
        let seconds = seconds.clamp(*RANGE.start(), *RANGE.end());
        let (days, time) = (seconds.div_euclid(DAY) + EPOCH, seconds.rem_euclid(DAY));
        let (era, day) = (days.div_euclid(ERA), days.rem_euclid(ERA));
        let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
        let day_of_year = day - (365 * year + year / 4 - year / 100);
        let month = (5 * day_of_year + 2) / 153;
        let month_of_year = if month < 10 { month + 3 } else { month - 9 };
        let year = year + era * 400 + i64::from(month_of_year <= 2);
        Self {
            second: (time % 60) as u8,
            minute: (time / 60 % 60) as u8,
            hour: (time / 3600) as u8,
            day: (day_of_year - (153 * month + 2) / 5 + 1) as u8,
            month: month_of_year as u8,
            year: year as u16,
        }
    }

    /// The second; fields out of range run over into the next (as 31 February does).
    pub fn to_seconds(self) -> i64 {
        let month = i64::from(self.month.clamp(1, 12));
        let year = i64::from(self.year) - i64::from(month <= 2);
        let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
        let month_from_march = (month + 9) % 12;
        let day_of_year = (153 * month_from_march + 2) / 5 + i64::from(self.day) - 1;
        let days = era * ERA + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - EPOCH;
        let time = i64::from(self.hour) * 3600 + i64::from(self.minute) * 60 + i64::from(self.second);
        days * DAY + time
    }

    /// 1 is Sunday.
    pub fn weekday(self) -> u8 {
        ((self.to_seconds().div_euclid(DAY) + 4).rem_euclid(7) + 1) as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_days() {
        let at = |seconds| {
            let t = DateTime::from_seconds(seconds);
            (t.year, t.month, t.day, t.hour, t.minute, t.second, t.weekday())
        };
        assert_eq!(at(0), (1970, 1, 1, 0, 0, 0, 5));
        assert_eq!(at(951_782_399), (2000, 2, 28, 23, 59, 59, 2));
        assert_eq!(at(951_782_400), (2000, 2, 29, 0, 0, 0, 3));
        assert_eq!(at(4_107_542_400), (2100, 3, 1, 0, 0, 0, 2));
        assert_eq!(at(i64::MAX), (9999, 12, 31, 23, 59, 59, 6));
        assert_eq!(at(i64::MIN).0, 0);
    }

    proptest! {
        #[test]
        fn there_and_back(seconds in RANGE) {
            prop_assert_eq!(DateTime::from_seconds(seconds).to_seconds(), seconds);
        }
        #[test]
        fn fields_out_of_range_never_panic(a: [u8; 5], year: u16) {
            let [second, minute, hour, day, month] = a;
            let t = DateTime { second, minute, hour, day, month, year };
            prop_assert!((1..=7).contains(&t.weekday()));
        }
    }
}
