-- What may have begun after a step stands with the step, so that recording one leaves its run's row alone.
alter table steps add column under_way text;
update steps s set under_way = r.under_way
from runs r
where r.under_way is not null and s.project_id = r.project_id and s.run_id = r.id
  and s.number = (select max(number) from steps where project_id = r.project_id and run_id = r.id);
alter table runs drop column under_way;

-- What models used stays on the account when the task or the conversation that it was used for is deleted; it goes with the project.
alter table model_calls drop constraint model_calls_run_fkey;
