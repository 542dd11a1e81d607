//! What Postgres knows of our tables.

use super::{Db, Result, World};

impl Db {
    /// Has Postgres look at tables that are twice as large as when it last did. Of a table that it has not looked at it knows nothing, and may look
    /// a task up by an index that has its id last; of one that was small it takes all rows to be quick to read. Each connection keeps to
    /// such a plan until someone looks. Postgres' own rounds begin a minute apart, in which a new installation under load would get slower
    /// with each task.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn look_at_grown_tables(&self, world: World) -> Result<()> {
        sqlx::query!(
            "do $$
            declare
                name text;
            begin
                for name in
                    select relname from pg_class
                    where relnamespace = current_schema()::regnamespace and relkind = 'r'
                      and pg_relation_size(oid) >= 2 * relpages * current_setting('block_size')::bigint
                      and (reltuples < 0 or relpages > 0) and pg_relation_size(oid) > 0
                    order by relname
                loop
                    execute format('analyze (skip_locked) %I', name);
                end loop;
            end
            $$"
        )
        .execute(self.claims(world))
        .await?;
        Ok(())
    }
}
