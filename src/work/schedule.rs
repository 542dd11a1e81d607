//! A schedule that is due: its mission begins, or both say why it does not.

use chrono::Utc;
use serde_json::{Map, Value};

use super::{Held, Result, WorkError};
use crate::app::CredentialsError;
use crate::ids::{Id, Schedule};
use crate::lifecycle::{LifecycleError, schedule};
use crate::mission::Document;
use crate::store::SWITCHED_OFF;
use crate::task::Settings;

/// Looks at a schedule whose time has come.
pub(super) async fn fire(held: &Held, id: Id<Schedule>) -> Result<()> {
    let db = &held.lease.db;
    if !db.settings().await?.enable_scheduler {
        // What is known of the settings may be old: asked again under the lock that a change of them holds.
        let mut tx = db.begin();
        tx.extend(&held.lease).await?;
        if !Settings::restored(&tx.lock_settings().await?).enable_scheduler {
            tx.park(&held.lease, SWITCHED_OFF).await?;
            return Ok(tx.commit().await?);
        }
    }
    let now = Utc::now();
    let (mission, definition) = db.scheduled_mission(id).await?;
    let fault = match fault_of(held, &definition).await? {
        Some(fault) => fault,
        None => match schedule::fire(&held.lease, id, mission, now).await {
            Ok(_) => return Ok(()),
            Err(LifecycleError::Invalid { message, .. }) => message,
            Err(LifecycleError::Faults(faults)) => faults.join("; "),
            Err(error) => return Err(error.into()),
        },
    };
    tracing::debug!(schedule = %id, "a scheduled mission cannot be executed: {fault}");
    schedule::skip_failed(&held.lease, id, mission, &fault, now).await?;
    Ok(())
}

/// Why the mission's models cannot be asked, if they cannot; the rest is found out when it is executed.
async fn fault_of(held: &Held, definition: &Map<String, Value>) -> Result<Option<String>> {
    match Document::parse(definition) {
        Ok(document) => held
            .app
            .unusable_model(&held.lease.db, &document)
            .await
            .map_err(|error| match error {
                CredentialsError::Store(error) => error.into(),
                error => WorkError::Defect(error.into()),
            }),
        Err(faults) => Ok(Some(faults.join("; "))),
    }
}
