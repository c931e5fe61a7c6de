/* The button that goes from the colours of the system to light and to dark ones. */
function addThemeButton() {
  const themes = ["system", "light", "dark"];
  const button = document.createElement("button");
  button.id = "theme";
  button.type = "button";
  let current = 0;
  const show = () => {
    if (current) document.documentElement.dataset.theme = themes[current];
    else delete document.documentElement.dataset.theme;
    button.textContent = `colours: ${themes[current]}`;
  };
  button.addEventListener("click", () => { current = (current + 1) % themes.length; show(); });
  show();
  document.querySelector("main").prepend(button);
}
addThemeButton();
