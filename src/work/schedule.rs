//! A schedule that is due: its mission begins, or both say why it does not.

use std::time::Duration;

use chrono::Utc;

use super::{Held, Result, WorkError};
use crate::ids::{Id, Schedule};
use crate::lifecycle::{LifecycleError, schedule};
use crate::mission::Document;

/// How long a due schedule rests while its project's schedules are switched off.
const SWITCHED_OFF: Duration = Duration::from_secs(60);

/// Looks at a schedule whose time has come.
pub(super) async fn fire(held: &Held, id: Id<Schedule>) -> Result<()> {
    let db = &held.lease.db;
    if !db.settings().await?.enable_scheduler {
        return Ok(held.put_off(SWITCHED_OFF).await?);
    }
    let now = Utc::now();
    let fault = match fault_of(held, id).await? {
        Some(fault) => fault,
        None => match schedule::fire(&held.lease, id, now).await {
            Ok(_) => return Ok(()),
            Err(LifecycleError::Invalid { message, .. }) => message,
            Err(LifecycleError::Faults(faults)) => faults.join("; "),
            Err(error) => return Err(error.into()),
        },
    };
    tracing::debug!(schedule = %id, "a scheduled mission cannot be executed: {fault}");
    schedule::skip_failed(&held.lease, id, &fault, now).await?;
    Ok(())
}

/// Why the mission's models cannot be asked, if they cannot; the rest is found out when it is executed.
async fn fault_of(held: &Held, id: Id<Schedule>) -> Result<Option<String>> {
    let db = &held.lease.db;
    let mission = db.schedule(Some(id), None).await?.mission;
    let definition = db.mission(mission).await?.definition;
    match Document::parse(&definition) {
        Ok(document) => held
            .app
            .unusable_model(db, &document)
            .await
            .map_err(|error| WorkError::Defect(error.into())),
        Err(faults) => Ok(Some(faults.join("; "))),
    }
}
