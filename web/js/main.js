/** What this pack adds to ComfyUI's interface. */

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { announceEnds } from "./ends.js";
import { showErrors } from "./errors.js";
import { showLive } from "./live.js";
import { showMissing } from "./missing.js";

app.registerExtension({
  name: "DanceGRPO",
  setup() {
    showErrors(app, api);
    announceEnds(app);
    showLive(app, api);
  },
  afterConfigureGraph() {
    showMissing(app);
  },
});
