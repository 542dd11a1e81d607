-- Whether another task has come to need this one. Set when it does, so that a change to this one that was made without holding it
-- notices: the row has a new version then.
alter table tasks add column needed boolean not null default false;
update tasks set needed = true where exists (
    select from dependencies d where d.project_id = tasks.project_id and d.needs_id = tasks.id
);
