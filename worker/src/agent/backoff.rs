//! How long to wait before the next try: doubling, capped, jittered so that a cluster of agents does not come back
//! in one instant. Pure: the caller brings the random number.

use std::time::Duration;

/// First delay.
const FIRST: Duration = Duration::from_millis(200);
/// Longest delay. A coordinator that is back is found within this time.
const LONGEST: Duration = Duration::from_secs(5);

/// Delay before try `attempt` (from 0); `unit` is a random number in [0, 1). Half of the delay is jitter.
pub fn delay(attempt: u32, unit: f64) -> Duration {
    let full = FIRST.saturating_mul(1u32 << attempt.min(16)).min(LONGEST);
    full.mul_f64(0.5 + 0.5 * unit.clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_the_cap_with_half_as_jitter() {
        assert_eq!(delay(0, 1.0), FIRST);
        assert_eq!(delay(0, 0.0), FIRST / 2);
        assert_eq!(delay(1, 1.0), FIRST * 2);
        for attempt in [5, 16, 40, u32::MAX] {
            assert_eq!(delay(attempt, 1.0), LONGEST);
            assert_eq!(delay(attempt, 0.0), LONGEST / 2);
        }
    }
}
