//! Answers that several viewers share. The control task is asked for one thing at most once in a while, and for few things at
//! the same time, however many browsers are open.

use super::answer::Tagged;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{
    sync::{Mutex as Turn, Semaphore},
    time::Instant,
};

/// An answer is given again for so long. The page asks once a second, and shows a change within two.
const FRESH: Duration = Duration::from_millis(300);
/// Things that are remembered.
const MAX_KEPT: usize = 256;
/// Questions to the control task at the same time.
const MAX_ASKING: usize = 4;

type Slot = Arc<Turn<Option<(Instant, Tagged)>>>;

/// The answers.
pub struct Cache {
    slots: Mutex<HashMap<String, Slot>>,
    asking: Semaphore,
}

impl Cache {
    /// An empty one.
    pub fn new() -> Self {
        Self {
            slots: Mutex::default(),
            asking: Semaphore::new(MAX_ASKING),
        }
    }

    /// The answer to `question`, made anew if the one that is there is not fresh. Who asks the same meanwhile waits for it.
    pub async fn get(&self, question: &str, make: impl Future<Output = Tagged>) -> Tagged {
        let slot = self.slot(question);
        let mut kept = slot.lock().await;
        if let Some((at, answer)) = kept.as_ref()
            && at.elapsed() < FRESH
        {
            return answer.clone();
        }
        // It is never closed.
        let _permit = self.asking.acquire().await;
        let answer = make.await;
        *kept = Some((Instant::now(), answer.clone()));
        answer
    }

    fn slot(&self, question: &str) -> Slot {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if slots.len() >= MAX_KEPT && !slots.contains_key(question) {
            slots.retain(|_, slot| match slot.try_lock() {
                Ok(kept) => kept.as_ref().is_some_and(|(at, _)| at.elapsed() < FRESH),
                Err(_) => true,
            });
            if slots.len() >= MAX_KEPT {
                // All are in use: this one is answered for itself.
                return Slot::default();
            }
        }
        slots.entry(question.to_owned()).or_default().clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::web::answer::TEXT;
    use axum::http::StatusCode;
    use std::sync::atomic::{AtomicU32, Ordering};

    struct Asked(AtomicU32);

    impl Asked {
        async fn answer(&self) -> Tagged {
            let number = self.0.fetch_add(1, Ordering::Relaxed);
            tokio::task::yield_now().await;
            Tagged::new(StatusCode::OK, TEXT, number.to_string())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn many_viewers_are_one_question() {
        let (cache, asked) = (Cache::new(), Asked(AtomicU32::new(0)));
        let ask = || cache.get("jobs", asked.answer());
        let (a, b, c) = tokio::join!(ask(), ask(), ask());
        assert_eq!([a.body, b.body, c.body], ["0", "0", "0"]);
        assert_eq!(cache.get("nodes", asked.answer()).await.body, "1");
        tokio::time::advance(FRESH).await;
        assert_eq!(cache.get("jobs", asked.answer()).await.body, "2");
    }

    #[tokio::test(start_paused = true)]
    async fn it_does_not_grow_with_what_is_asked() {
        let (cache, asked) = (Cache::new(), Asked(AtomicU32::new(0)));
        for number in 0..3 * MAX_KEPT {
            cache.get(&number.to_string(), asked.answer()).await;
        }
        let kept = || cache.slots.lock().expect("nobody panicked").len();
        assert_eq!(kept(), MAX_KEPT);
        tokio::time::advance(FRESH).await;
        cache.get("another", asked.answer()).await;
        assert_eq!(kept(), 1);
    }
}
