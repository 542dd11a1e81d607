//! Drives a system and checks every byte that it answers.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use futures::StreamExt;
use serde_json::{Value, json};

use crate::upstream::{now_us, text};

/// Where to send requests, and with which key.
#[derive(Clone)]
pub(crate) struct Target {
    pub(crate) client: reqwest::Client,
    pub(crate) url: String,
    pub(crate) key: String,
}

/// How long each request took, in milliseconds, and all of them together.
pub(crate) struct Measured {
    pub(crate) latencies_ms: Vec<f64>,
    pub(crate) elapsed: Duration,
}

impl Target {
    async fn send(&self, model: &str, streams: bool) -> anyhow::Result<reqwest::Response> {
        let body = json!({"model": model, "stream": streams, "messages": [{"role": "user", "content": "How is the weather today?"}]});
        let request = self
            .client
            .post(format!("{}/v1/chat/completions", self.url))
            .bearer_auth(&self.key)
            .json(&body);
        let response = request.send().await?;
        if response.status() != 200 {
            bail!("status {}: {}", response.status(), response.text().await?);
        }
        Ok(response)
    }

    /// A plain answer, checked.
    async fn plain(&self, model: &str, expect: &str) -> anyhow::Result<()> {
        let answer: Value = self.send(model, false).await?.json().await?;
        ensure!(
            answer["choices"][0]["message"]["content"] == expect,
            "wrong content: {answer}"
        );
        Ok(())
    }

    /// A stream, checked.
    async fn stream(&self, model: &str, expect: &str) -> anyhow::Result<()> {
        let body = self.send(model, true).await?.text().await?;
        let mut said = String::new();
        let mut last = "";
        for data in body
            .split("\n\n")
            .filter_map(|event| event.strip_prefix("data: "))
        {
            if data != "[DONE]" {
                let chunk: Value = serde_json::from_str(data).context("a chunk is not JSON")?;
                said.push_str(
                    chunk["choices"][0]["delta"]["content"]
                        .as_str()
                        .unwrap_or_default(),
                );
            }
            last = data;
        }
        ensure!(
            last == "[DONE]",
            "the stream does not end in [DONE]: {last}"
        );
        ensure!(said == expect, "wrong content: {said}");
        Ok(())
    }

    async fn ask(&self, model: &str, streams: bool, expect: &str) -> anyhow::Result<()> {
        if streams {
            self.stream(model, expect).await
        } else {
            self.plain(model, expect).await
        }
    }

    /// So many requests, so many at once.
    pub(crate) async fn closed_loop(
        &self,
        model: &str,
        streams: bool,
        tokens: usize,
        requests: usize,
        at_once: usize,
    ) -> anyhow::Result<Measured> {
        let expect: Arc<str> = text(tokens).into();
        let left = Arc::new(AtomicUsize::new(requests));
        let latencies = Arc::new(Mutex::new(Vec::with_capacity(requests)));
        let began = Instant::now();
        let workers = (0..at_once).map(|_| {
            let (target, model, expect) = (self.clone(), model.to_owned(), expect.clone());
            let (left, latencies) = (left.clone(), latencies.clone());
            tokio::spawn(async move {
                let mut mine = Vec::new();
                while left
                    .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                        left.checked_sub(1)
                    })
                    .is_ok()
                {
                    let sent = Instant::now();
                    target.ask(&model, streams, &expect).await?;
                    mine.push(sent.elapsed().as_secs_f64() * 1000.0);
                }
                latencies.lock().expect("no worker panics").extend(mine);
                anyhow::Ok(())
            })
        });
        for worker in workers.collect::<Vec<_>>() {
            worker.await??;
        }
        let elapsed = began.elapsed();
        let latencies_ms = std::mem::take(&mut *latencies.lock().expect("no worker panics"));
        Ok(Measured {
            latencies_ms,
            elapsed,
        })
    }

    /// So many plain requests a second, whether or not the ones before have ended.
    pub(crate) async fn open_loop(
        &self,
        model: &str,
        tokens: usize,
        per_second: u32,
        seconds: u32,
    ) -> anyhow::Result<Measured> {
        let expect: Arc<str> = text(tokens).into();
        let began = Instant::now();
        let mut interval = tokio::time::interval(Duration::from_secs(1) / per_second);
        let mut requests = Vec::new();
        for _ in 0..per_second * seconds {
            interval.tick().await;
            let (target, model, expect) = (self.clone(), model.to_owned(), expect.clone());
            requests.push(tokio::spawn(async move {
                let sent = Instant::now();
                target.plain(&model, &expect).await?;
                anyhow::Ok(sent.elapsed().as_secs_f64() * 1000.0)
            }));
        }
        let mut latencies_ms = Vec::new();
        for request in requests {
            latencies_ms.push(request.await??);
        }
        Ok(Measured {
            latencies_ms,
            elapsed: began.elapsed(),
        })
    }

    /// So many streams held at once, each of so many tokens at 20 a second. The latencies are those of single tokens.
    pub(crate) async fn held_streams(
        &self,
        streams: usize,
        tokens: usize,
    ) -> anyhow::Result<Measured> {
        let model = format!("paced-{tokens}");
        let began = Instant::now();
        let mut readers = Vec::new();
        for _ in 0..streams {
            let (target, model) = (self.clone(), model.clone());
            readers.push(tokio::spawn(async move {
                target.read_paced(&model, tokens).await
            }));
            // Two seconds of arrivals: the streams are what is measured, not their beginning.
            tokio::time::sleep(Duration::from_micros(1_000_000 * 2 / streams as u64)).await;
        }
        let mut latencies_ms = Vec::new();
        for reader in readers {
            latencies_ms.extend(reader.await??);
        }
        Ok(Measured {
            latencies_ms,
            elapsed: began.elapsed(),
        })
    }

    async fn read_paced(&self, model: &str, tokens: usize) -> anyhow::Result<Vec<f64>> {
        let mut pieces = self.send(model, true).await?.bytes_stream();
        let mut held = String::new();
        let mut delays = Vec::with_capacity(tokens);
        let mut done = false;
        while let Some(piece) = pieces.next().await {
            held.push_str(std::str::from_utf8(&piece?)?);
            while let Some(end) = held.find("\n\n") {
                let event: String = held.drain(..end + 2).collect();
                let Some(data) = event.trim_end().strip_prefix("data: ") else {
                    continue;
                };
                if data == "[DONE]" {
                    done = true;
                    continue;
                }
                let chunk: Value = serde_json::from_str(data)?;
                if let Some(sent) = chunk["choices"][0]["delta"]["content"]
                    .as_str()
                    .and_then(|text| text.trim().parse::<u64>().ok())
                {
                    delays.push(now_us().saturating_sub(sent) as f64 / 1000.0);
                }
            }
        }
        ensure!(
            done && delays.len() == tokens,
            "{} of {tokens} tokens, done: {done}",
            delays.len()
        );
        Ok(delays)
    }
}
